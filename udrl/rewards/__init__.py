"""Rewards: the components of an episode's reward and the pass that scores completions."""
