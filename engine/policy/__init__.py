"""The policy: a stock transformers vision-language model, its prompts and its log-probabilities."""
