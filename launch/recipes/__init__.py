"""What `launch.train` trains: the bundled model, twins, conversion to Ladder."""
