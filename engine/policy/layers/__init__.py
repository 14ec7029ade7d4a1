"""Layers of the stock model that run on code of this package: attention, fused layers, the last layer, the image tower."""
