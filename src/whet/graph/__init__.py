"""What one run of the network tells: its calls, coupled channels, surgery and statistics."""
