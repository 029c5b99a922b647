"""What engines are given: folders of models, their weights and training, the text and questions that they know.

Rule: no engine, no server, no other room; transformers and torch where weights are made.
"""
