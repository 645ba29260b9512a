"""Outputs of a given form: grammars tried out in a process of their own, and which tokens they allow next, step by step."""
