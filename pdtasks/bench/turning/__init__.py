"""A load that turns, from long prompts to long answers and back, and the roles that follow it."""
