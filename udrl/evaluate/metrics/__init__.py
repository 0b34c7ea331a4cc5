"""The numbers of an evaluation, as pure functions of its tables."""
