package dev.flrc.engine;

/** A value that must be finite is not. */
public final class NumericalException extends FlrcException {
    public NumericalException(String message) {
        super(message, "import the bundle again; if it stays so, export it again");
    }
}
