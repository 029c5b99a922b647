"""How a launch comes to SGLang's processes, what is late there, and what its user should know."""
