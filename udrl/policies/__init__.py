"""Policies: the models that write prompts, and the one vLLM stage that teacher, student, baselines and judges share."""
