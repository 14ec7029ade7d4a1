"""What ``update_step.py`` and ``gpu_check.py`` measure: ways from rollouts to gradients."""
