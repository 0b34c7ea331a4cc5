"""Distil an LLM into a small, controllable model by upside-down reinforcement learning, on Ray."""
