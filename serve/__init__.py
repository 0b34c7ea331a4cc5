"""Serving: Ray Serve deployments that answer prompt requests with a run's student.

The package has the same name as Ray's: inside it, Ray's is always imported as ``from ray import serve as ray_serve``.
"""
