"""What is measured, one file a part; `aiflow bench` runs them."""
