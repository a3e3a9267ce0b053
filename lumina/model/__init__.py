"""Token ids and document segments flow in; loss sums (training, evaluation) or logits (generation) flow out."""
