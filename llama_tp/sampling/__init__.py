"""From logits to token ids: parameters, filters and draws, on the shards of the vocabulary or from
gathered logits."""
