"""The sharded model: mesh, residual stream, modules, checkpoint loading."""
