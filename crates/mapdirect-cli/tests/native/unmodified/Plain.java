import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;

/** Maps a file, and never unmaps it: that is up to the garbage collector. */
public class Plain {
    interface Action {
        void run() throws IOException;
    }

    static String word(Action action) {
        try {
            action.run();
            return "ok";
        } catch (IOException refused) {
            System.err.println("refused: " + refused);
            return "refused";
        }
    }

    public static void main(String[] arguments) throws Exception {
        RandomAccessFile file = new RandomAccessFile(arguments[0] + "/plain", "rw");
        FileChannel channel = file.getChannel();
        int length = 1 << 20;
        MappedByteBuffer memory = channel.map(FileChannel.MapMode.READ_WRITE, 0, length);
        System.out.println("ready");
        if (System.in.read() < 0) {
            System.exit(1);
        }
        for (int at = 0; at < length; at++) {
            if (memory.get(at) != (byte) at) {
                throw new Exception("wrong at " + at);
            }
        }
        memory.put(5000, (byte) 1);
        memory.force();
        String grow = word(() -> file.setLength(length + 8192));
        String cut = word(() -> channel.truncate(length));
        System.out.println("done grow=" + grow + " cut=" + cut);
    }
}
