"""The generate stage: intents, expanded if the recipe asks for it, through the teacher into a described data set."""
