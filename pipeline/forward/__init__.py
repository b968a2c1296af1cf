"""From token ids to log-probs: packing, attention and the head."""
