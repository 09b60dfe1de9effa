"""What differs between two models, tensor by tensor, and which method fits to store it."""
