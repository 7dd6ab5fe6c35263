"""`lookalike doctor`: what is wrong with a deployment, looked at from outside and inside."""
