"""What the service promises, held against an independent account of it, from outside and over many decisions."""
