"""What suites of `launch.bench` share: hosts of network namespaces, pairs of processes, links, spans."""
