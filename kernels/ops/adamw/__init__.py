"""AdamW over all parameters at once: an update is measured before it is made."""
