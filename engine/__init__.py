"""balcaprl: balanced reinforcement learning for image captioners.

Importing this package is cheap; subpackages load what they need when they are asked for it.
"""

__version__ = "0.1.0"
