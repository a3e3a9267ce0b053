"""Files flow in; documents, then tokens, then batches flow out: batch i is a pure function of seed, data and i."""
