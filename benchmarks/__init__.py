"""What is measured: speed beside dense training, and what the methods reach on MNIST."""
