"""Values and gradients of the named problems to ten digits, in two ways that share no code."""
