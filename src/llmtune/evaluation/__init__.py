"""How good the model is: held-out loss, and what it answers."""
