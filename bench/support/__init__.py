"""What the measurements share: where figures come from, and the files that hold them."""
