"""Serving: Ray Serve deployments that answer prompt requests with a run's student.

The package shares its name with Ray's: inside it, Ray's is always imported as ``from ray import serve as ray_serve``.
"""
