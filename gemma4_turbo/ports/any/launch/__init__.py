"""How a launch comes to SGLang's processes, and what its user should know."""
