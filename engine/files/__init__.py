"""Files that a run reads and writes: JSON Lines, manifests, ownership marks and locks, rotation."""
