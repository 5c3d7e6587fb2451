"""How a model is trained: the loop over slow steps, several processes, progress on the terminal, TensorBoard."""
