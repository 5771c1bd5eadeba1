"""What suites of `launch.bench` share: hosts of network namespaces, rank processes, links, spans."""
