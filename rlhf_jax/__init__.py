"""Reinforcement learning from human feedback in JAX.

Import the modules you need (`from rlhf_jax.updates import ppo`); importing the
package alone loads nothing else and touches no device.
"""

__version__ = "0.1.0"
