"""From what a record says of its image to RGB pixels."""
