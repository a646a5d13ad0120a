"""What is shown on request: the host file as a map, single tables, one offset explained."""
