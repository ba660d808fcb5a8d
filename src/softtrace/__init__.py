"""softtrace."""
