"""Files flow in; documents, then tokens, then batches flow out. Batch i = f(seed, data, i)."""
