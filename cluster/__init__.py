"""The control plane under Ray: controller, gangs of ranks, gateway, router, monitor."""
