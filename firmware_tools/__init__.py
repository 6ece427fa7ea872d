"""What an operator holds in the hand: one module per subcommand of `aiflow`."""
