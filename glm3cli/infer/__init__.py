"""Generation and scoring: token ids in, token ids or logits out."""
