"""Rank processes: how a run over several ranks is started, watched, compared shard by shard, and merged.

R ranks, r a rank, K micro-batches per cycle and rank.
"""
