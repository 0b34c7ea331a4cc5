"""Policies: who writes prompts. Teacher, student and baselines go through one vLLM stage."""
