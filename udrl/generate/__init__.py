"""The generate stage: intents (grown, if asked) through the teacher into a described data set, with its plan and its cost."""
