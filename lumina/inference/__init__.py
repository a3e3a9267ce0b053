"""A run's weights and a prompt flow in; text flows out, token by token."""
