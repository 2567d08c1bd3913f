"""The search: space, storage, slots, sampler, pruner, study, objective. optuna is imported only here."""
