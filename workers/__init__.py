"""What runs on a rank: vocabulary, scheduler, KV blocks, engine, executor, sampler, trainer."""
