"""The student: a GPT-2 with a command vocabulary, trained on Ray Train and DeepSpeed."""
