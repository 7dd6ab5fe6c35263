"""What an embedding is: the contract that training writes and that index and service read."""
