"""Configuration of the programs around pdtasks."""
