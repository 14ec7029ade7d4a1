"""The language-model head: log-probabilities and policy loss from hidden states, without the matrix of logits."""
